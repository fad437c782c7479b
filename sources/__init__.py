"""Where images come from. Each module returns (classes, train images, train labels, test images, test labels)."""
