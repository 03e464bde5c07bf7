// Boot: everything a guest finds in memory and in its first processor before its first instruction.
//
// The module turns a configuration and the headers of a kernel file into a `BootPlan`: small writes (tables, parameters),
// large copies (straight from a file descriptor into guest memory), and the register state at the entry point. It knows
// no KVM and no device; the addresses that device models must agree on are in `PhysicalMap` and `PlatformPort`.
//
//   let plan = try BootPlan(configuration: configuration, kernel: kernelFile, initramfs: initramfsFile)
//   try plan.load(into: memory, kernel: kernelFile, initramfs: initramfsFile)
