"""All about probes that is no probe: the protocol, saving, several reads, fitting, wrapping."""
