"""What heads are fitted to: conversations about the text, and what attention saw in them."""
