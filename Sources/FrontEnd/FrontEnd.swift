// FrontEnd: see ARCHITECTURE.md.
