// Boot: see ARCHITECTURE.md.
