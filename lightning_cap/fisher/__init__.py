"""From gradient rows to Fisher blocks, and the plan of the memory that they take."""
