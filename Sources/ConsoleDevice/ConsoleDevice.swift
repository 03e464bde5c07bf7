// ConsoleDevice: see ARCHITECTURE.md.
