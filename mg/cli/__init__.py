"""The commands, one module each: parse options, call the library, print results. Nothing in mg imports them."""
