"""What policies that talk are made of: template, pieces of a conversation, eyes, network, engine, scoring."""
