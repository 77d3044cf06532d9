"""How many tokens each optimizer needs to reach the final loss of a tuned baseline, by a protocol in YAML."""
