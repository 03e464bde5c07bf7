// Supervision: see ARCHITECTURE.md.
