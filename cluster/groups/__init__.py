"""Groups as Ray actors: what runs in a rank, what it needs, and what its errors mean."""
