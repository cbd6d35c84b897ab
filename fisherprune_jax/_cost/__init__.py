"""What a masked network costs."""
