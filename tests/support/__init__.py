"""What the tests share: brokers, worker and beat processes, and the application under test."""
