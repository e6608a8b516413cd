"""One step in several modes: time, memory and differences of results, compared with what FLOPs allow."""
