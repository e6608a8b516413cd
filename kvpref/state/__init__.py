"""What passes hand on: keys and values on the device and in host memory."""
