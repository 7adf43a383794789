"""The attack protocol, what an attack is shown, and how its proposals are judged."""
