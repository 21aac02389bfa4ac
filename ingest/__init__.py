"""From what arrives to facts: formats, what is accepted, what is refused and why."""
