// Monitor: see ARCHITECTURE.md.
