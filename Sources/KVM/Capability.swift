/// KVM capabilities that Martlet asks about (`KVM_CAP_*`).
package enum Capability: UInt, CaseIterable, Sendable {
  case interruptController = 0
  case userMemory = 3
  case setTSSAddress = 4
  case extendedCPUID = 7
  case recommendedVCPUs = 9
  case memorySlots = 10
  case mpState = 14
  case interruptRouting = 25
  case irqfd = 32
  case ioeventfd = 36
  case setIdentityMapAddress = 37
  case adjustClock = 39
  case vcpuEvents = 41
  case debugRegisters = 50
  case xsave = 55
  case xcrs = 56
  case tscFrequency = 61
  case maximumVCPUs = 66
  case tscDeadlineTimer = 72
  case readOnlyMemory = 81
  case signalMSI = 77
  case checkExtensionOnVM = 105
  case splitInterruptController = 121
  case ioeventfdAnyLength = 122
  case maximumVCPUID = 128
  case x2APIC = 129
  case immediateExit = 136
  case xsave2 = 208

  /// The kernel's name without its prefix.
  package var name: String {
    switch self {
    case .interruptController: "IRQCHIP"
    case .userMemory: "USER_MEMORY"
    case .setTSSAddress: "SET_TSS_ADDR"
    case .extendedCPUID: "EXT_CPUID"
    case .recommendedVCPUs: "NR_VCPUS"
    case .memorySlots: "NR_MEMSLOTS"
    case .mpState: "MP_STATE"
    case .interruptRouting: "IRQ_ROUTING"
    case .irqfd: "IRQFD"
    case .ioeventfd: "IOEVENTFD"
    case .setIdentityMapAddress: "SET_IDENTITY_MAP_ADDR"
    case .adjustClock: "ADJUST_CLOCK"
    case .vcpuEvents: "VCPU_EVENTS"
    case .debugRegisters: "DEBUGREGS"
    case .xsave: "XSAVE"
    case .xcrs: "XCRS"
    case .tscFrequency: "GET_TSC_KHZ"
    case .maximumVCPUs: "MAX_VCPUS"
    case .tscDeadlineTimer: "TSC_DEADLINE_TIMER"
    case .readOnlyMemory: "READONLY_MEM"
    case .signalMSI: "SIGNAL_MSI"
    case .checkExtensionOnVM: "CHECK_EXTENSION_VM"
    case .splitInterruptController: "SPLIT_IRQCHIP"
    case .ioeventfdAnyLength: "IOEVENTFD_ANY_LENGTH"
    case .maximumVCPUID: "MAX_VCPU_ID"
    case .x2APIC: "X2APIC_API"
    case .immediateExit: "IMMEDIATE_EXIT"
    case .xsave2: "XSAVE2"
    }
  }

  /// Without these no guest is started.
  package static let required: [Capability] = [
    .interruptController, .userMemory, .setTSSAddress, .extendedCPUID, .mpState, .interruptRouting, .irqfd, .ioeventfd,
    .setIdentityMapAddress, .vcpuEvents, .xsave, .signalMSI, .splitInterruptController, .immediateExit,
  ]
}
