// Tests of ConsoleDevice.
