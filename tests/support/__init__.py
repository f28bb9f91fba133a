"""What tests share: small models and runs that are made once, the servers, a hub on a loopback port."""
