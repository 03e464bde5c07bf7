// Tests of HostSystem.
