"""What makes a run safe: settings, folder, state, verified files, lock; and which runs a command needs."""
