"""What passes leave for later ones: keys, values and recurrent states, on the device and in host memory."""
