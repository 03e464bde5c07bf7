// Tests of Isolation.
