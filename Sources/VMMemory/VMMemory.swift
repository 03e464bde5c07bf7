// VMMemory: see ARCHITECTURE.md.
