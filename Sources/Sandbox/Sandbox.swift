// Sandbox: see ARCHITECTURE.md.
