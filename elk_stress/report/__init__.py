"""What a run shows and writes: tables on the terminal, two figures, a report in words, one folder."""
