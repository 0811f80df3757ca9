"""The page that shows what a run has learned: its files, the definitions of its metrics, its tokens, and the page."""
