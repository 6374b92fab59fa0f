"""What every protocol shares: a call, what was asked, what is answered. No gRPC."""
