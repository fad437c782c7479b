"""What finished runs say: comparison, statistics, tables and figures. Needs neither PyTorch nor the data."""
