"""flashedu in other libraries. Each module imports its library; this one imports none."""
