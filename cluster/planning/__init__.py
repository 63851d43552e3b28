"""From a specification to tasks, with every choice that decides bits made once."""
