"""What experiments leave on disk: numbers as JSON and CSV, and measurements that are not made twice."""
