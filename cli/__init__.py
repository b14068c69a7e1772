"""The command line. Imports nothing heavy until a command needs it; `main` turns every error into one line."""
