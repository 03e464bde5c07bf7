// Tests of Boot.
