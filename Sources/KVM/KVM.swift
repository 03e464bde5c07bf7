// KVM: typed ioctls. `System` is /dev/kvm, `VirtualMachine` a VM, `VCPU` one processor; each owns its descriptor. The
// module knows what the kernel's calls mean and in which order they are allowed; it knows no device and no guest layout.
//
//   let system = try System(adopting: fd)
//   let machine = try system.createVirtualMachine()
//   try machine.enableSplitInterruptController(pinCount: 24)
//   let processor = try machine.createVCPU(id: 0, runByteCount: system.runByteCount)

import CLinux
import HostSystem

/// ioctl request numbers (linux/kvm.h). CLinux asserts that the kernel's headers agree.
enum Request: UInt {
  case getAPIVersion = 0xAE00
  case createVM = 0xAE01
  case getMSRIndexList = 0xC004_AE02
  case checkExtension = 0xAE03
  case getVCPUMapSize = 0xAE04
  case getSupportedCPUID = 0xC008_AE05
  case createVCPU = 0xAE41
  case setUserMemoryRegion = 0x4020_AE46
  case setTSSAddress = 0xAE47
  case setIdentityMapAddress = 0x4008_AE48
  case setGSIRouting = 0x4008_AE6A
  case irqfd = 0x4020_AE76
  case ioeventfd = 0x4040_AE79
  case setClock = 0x4030_AE7B
  case getClock = 0x8030_AE7C
  case run = 0xAE80
  case getRegisters = 0x8090_AE81
  case setRegisters = 0x4090_AE82
  case getSpecialRegisters = 0x8138_AE83
  case setSpecialRegisters = 0x4138_AE84
  case getMSRs = 0xC008_AE88
  case setMSRs = 0x4008_AE89
  case getLAPIC = 0x8400_AE8E
  case setLAPIC = 0x4400_AE8F
  case setCPUID = 0x4008_AE90
  case getMPState = 0x8004_AE98
  case setMPState = 0x4004_AE99
  case nmi = 0xAE9A
  case getEvents = 0x8040_AE9F
  case setEvents = 0x4040_AEA0
  case getDebugRegisters = 0x8080_AEA1
  case setDebugRegisters = 0x4080_AEA2
  case getTSCFrequency = 0xAEA3
  case enableCapability = 0x4068_AEA3
  case getXSAVE = 0x9000_AEA4
  case setXSAVE = 0x5000_AEA5
  case signalMSI = 0x4020_AEA5
  case getXCRs = 0x8188_AEA6
  case setXCRs = 0x4188_AEA7
  case kvmclockControl = 0xAEAD
  case getXSAVE2 = 0x9000_AECF
}

/// An ioctl whose argument is a number; the result is the call's, or -errno.
@inline(__always)
func call(_ fd: CInt, _ request: Request, _ argument: UInt = 0) -> CInt {
  clinux_ioctl(fd, request.rawValue, argument)
}

/// An ioctl whose argument points to one of the kernel's structures.
@inline(__always)
func call<Structure: BitwiseCopyable>(_ fd: CInt, _ request: Request, _ argument: inout Structure) -> CInt {
  // SAFETY: the callers pair each request with its structure (sizes are part of the request numbers); it is ours and
  // alive for the call.
  unsafe withUnsafeMutableBytes(of: &argument) { bytes in
    unsafe clinux_ioctl_pointer(fd, request.rawValue, bytes.baseAddress)
  }
}

/// An ioctl on a structure of variable length, laid out in 64-bit words.
@inline(__always)
func call(_ fd: CInt, _ request: Request, words: inout [UInt64]) -> CInt {
  // SAFETY: the callers size the array for the header and as many entries as the header says.
  unsafe words.withUnsafeMutableBytes { bytes in
    unsafe clinux_ioctl_pointer(fd, request.rawValue, bytes.baseAddress)
  }
}

/// The result of a call, or the error with what was being done.
@inline(__always)
@discardableResult
func require(_ result: CInt, _ doing: KVMOperation) throws(KVMError) -> CInt {
  guard result >= 0 else { throw .failed(doing, Errno(-result)) }
  return result
}
