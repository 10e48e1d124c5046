"""The commands, a module each: read the options, call the library, print what it found. Nothing in mg imports them."""
