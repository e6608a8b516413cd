"""One step in several modes: time, memory and differences of results, beside what FLOPs allow."""
