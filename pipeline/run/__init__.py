"""What all stages share: a run's folder and its layout, what a stage is, and the graph that runs the stale ones."""
