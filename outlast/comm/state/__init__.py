"""What error feedback remembers: kept by parameter name, saved, and redistributed over other numbers of ranks."""
