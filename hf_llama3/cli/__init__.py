"""The command line: a module for each group of commands, each of which parses, calls one function and prints."""
