"""What every protocol shares: who may call, what was asked, what is answered. No gRPC."""
