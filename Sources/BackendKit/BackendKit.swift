// BackendKit: see ARCHITECTURE.md.
