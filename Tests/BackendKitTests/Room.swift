// Tests of BackendKit.
