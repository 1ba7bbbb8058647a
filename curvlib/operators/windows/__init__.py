"""Windows of gradient rows, and the small systems that M-FAC solves with them."""
