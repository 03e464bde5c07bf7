// Tests of VirtioTransport.
