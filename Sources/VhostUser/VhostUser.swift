// VhostUser: see ARCHITECTURE.md.
