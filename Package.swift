// swift-tools-version: 6.2
//
// Layers: a target depends only on targets of a lower layer (ARCHITECTURE.md, "Modules"); `scripts/check` verifies that
// the sources import nothing that is not declared here.

import PackageDescription

/// Every Swift target: Swift 6 language mode, strict memory safety, warnings are errors.
let strict: [SwiftSetting] = [
  .swiftLanguageMode(.v6),
  .strictMemorySafety(),
  .treatAllWarnings(as: .error),
]

/// Executables are fully static and position independent; only lld can link them so, and the build must be run with
/// `--disable-local-rpath`, because glibc's static start-up code asserts on a run path.
let staticPIE: [LinkerSetting] = [
  .unsafeFlags([
    "-static-executable", "-use-ld=lld", "-Xclang-linker", "-static-pie",
    "-Xlinker", "--gc-sections", "-Xlinker", "--icf=safe",
  ])
]

func module(_ name: String, _ dependencies: [String] = []) -> Target {
  .target(name: name, dependencies: dependencies.map { .byName(name: $0) }, swiftSettings: strict)
}

func program(_ name: String, _ dependencies: [String], entry: String? = nil) -> Target {
  .executableTarget(
    name: name, dependencies: dependencies.map { .byName(name: $0) }, swiftSettings: strict,
    linkerSettings: staticPIE + (entry.map { [.unsafeFlags(["-Xlinker", "--entry=\($0)"])] } ?? []))
}

func tests(_ name: String, _ dependencies: [String]) -> Target {
  .testTarget(
    name: name, dependencies: dependencies.map { .byName(name: $0) },
    swiftSettings: [.swiftLanguageMode(.v6), .treatAllWarnings(as: .error)])
}

let layer0: [Target] = [
  .target(name: "CLinux", cSettings: [.unsafeFlags(["-Wall", "-Wextra", "-Werror", "-fno-omit-frame-pointer"])]),
  // Runs before the program is relocated.
  .target(
    name: "CRun",
    cSettings: [.unsafeFlags(["-Wall", "-Wextra", "-Werror", "-ffreestanding", "-fno-stack-protector", "-O2"])]),
  .systemLibrary(name: "CCapNG", pkgConfig: "libcap-ng", providers: [.apt(["libcap-ng-dev"])]),
]

let layer1: [Target] = [
  .target(
    name: "CSandbox", dependencies: ["CCapNG", "CLinux"],
    cSettings: [.unsafeFlags(["-Wall", "-Wextra", "-Werror", "-ffunction-sections"])]),
  module("HostSystem", ["CLinux"]),
  module("VirtioSpec"),
]

let layer2: [Target] = [
  module("VMMemory", ["CLinux", "HostSystem"]),
  module("VhostUser", ["CLinux", "HostSystem", "VirtioSpec"]),
  module("Sandbox", ["CLinux", "HostSystem"]),
  module("KVM", ["CLinux", "HostSystem"]),
  module("DiskImage", ["CLinux", "HostSystem"]),
  module("ControlProtocol", ["CLinux", "HostSystem", "VirtioSpec"]),
]

let layer3: [Target] = [
  module("VirtioQueue", ["CLinux", "HostSystem", "VirtioSpec", "VMMemory"]),
  module("VirtioTransport", ["VirtioSpec"]),
  module("Boot", ["HostSystem", "VMMemory"]),
]

let layer4: [Target] = [
  module("BackendKit", ["CLinux", "HostSystem", "VirtioSpec", "VMMemory", "VhostUser", "VirtioQueue", "Sandbox"]),
  module("FrontEnd", ["CLinux", "HostSystem", "VirtioSpec", "VMMemory", "VhostUser", "ControlProtocol", "VirtioTransport"]),
  module("Supervision", ["CLinux", "CSandbox", "HostSystem", "VirtioSpec", "Sandbox", "ControlProtocol"]),
  module("Machine", ["CLinux", "HostSystem", "VirtioSpec", "VMMemory", "KVM", "VirtioTransport", "Boot"]),
]

let layer5: [Target] = [
  module("BackendTesting", ["HostSystem", "VirtioSpec", "VMMemory", "VhostUser", "VirtioQueue", "BackendKit"]),
  module("BlockDevice", ["CLinux", "HostSystem", "VirtioSpec", "VMMemory", "VirtioQueue", "DiskImage", "BackendKit"]),
  module("NetDevice", ["CLinux", "HostSystem", "VirtioSpec", "VMMemory", "VirtioQueue", "BackendKit"]),
  module("ConsoleDevice", ["CLinux", "HostSystem", "VirtioSpec", "VMMemory", "VirtioQueue", "BackendKit"]),
  module("Probe", ["CLinux", "HostSystem", "VirtioSpec", "VMMemory", "VhostUser", "VirtioQueue", "ControlProtocol"]),
  module(
    "Monitor",
    [
      "CLinux", "HostSystem", "VirtioSpec", "VMMemory", "VhostUser", "KVM", "Sandbox", "ControlProtocol", "VirtioTransport", "Boot",
      "FrontEnd", "Machine",
    ]),
]

let programs: [Target] = [
  program("martlet", ["CLinux", "CRun", "HostSystem", "VirtioSpec", "ControlProtocol", "KVM", "Boot"], entry: "crun_entry"),
  program("martlet-supervisor", ["HostSystem", "ControlProtocol", "Supervision"]),
  program("martlet-core", ["HostSystem", "Monitor"]),
  program("martlet-block", ["HostSystem", "BlockDevice"]),
  program("martlet-net", ["HostSystem", "NetDevice"]),
  program("martlet-console", ["HostSystem", "ConsoleDevice"]),
  program("martlet-template", ["HostSystem", "VirtioSpec", "VirtioQueue", "BackendKit"]),
  program("martlet-probe", ["Probe"]),
  program("martlet-jail", ["HostSystem", "Supervision"]),
]

let everything = [
  "CLinux", "HostSystem", "VirtioSpec", "VMMemory", "VhostUser", "Sandbox", "KVM", "DiskImage", "ControlProtocol",
  "VirtioQueue", "VirtioTransport", "Boot", "BackendKit", "FrontEnd", "Supervision", "Machine", "BlockDevice",
  "NetDevice", "ConsoleDevice", "Monitor",
]

/// Tests mirror the modules one to one; the rooms by promise (`Conformance`, `Isolation`, `Guests`) may use every module.
let testTargets: [Target] = [
  .target(
    name: "TestSupport", dependencies: everything.map { .byName(name: $0) }, path: "Tests/TestSupport",
    swiftSettings: [.swiftLanguageMode(.v6), .treatAllWarnings(as: .error)]),
  .executableTarget(
    name: "martlet-fake", dependencies: ["HostSystem", "VirtioSpec", "ControlProtocol", "Sandbox"].map { .byName(name: $0) },
    path: "Tests/FakeProgram", swiftSettings: strict, linkerSettings: staticPIE),
  .target(
    name: "HostileAttacks", path: "Tests/HostileAttacks",
    cSettings: [.unsafeFlags(["-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"])]),
  .executableTarget(
    name: "martlet-hostile", dependencies: ["CLinux", "CSandbox", "HostSystem", "HostileAttacks", "Sandbox"].map { .byName(name: $0) },
    path: "Tests/HostileProgram", swiftSettings: strict, linkerSettings: staticPIE),
  tests("HostSystemTests", ["CLinux", "HostSystem", "TestSupport"]),
  tests("VirtioSpecTests", ["VirtioSpec"]),
  tests("VMMemoryTests", ["CLinux", "HostSystem", "VMMemory", "TestSupport"]),
  tests("VhostUserTests", ["CLinux", "HostSystem", "VirtioSpec", "VhostUser", "TestSupport"]),
  tests("SandboxTests", ["CLinux", "HostSystem", "Sandbox", "TestSupport"]),
  tests("KVMTests", ["CLinux", "HostSystem", "KVM", "TestSupport"]),
  tests("DiskImageTests", ["CLinux", "HostSystem", "DiskImage", "TestSupport"]),
  tests("ControlProtocolTests", ["CLinux", "HostSystem", "VirtioSpec", "ControlProtocol", "TestSupport"]),
  tests("VirtioQueueTests", ["CLinux", "HostSystem", "VirtioSpec", "VMMemory", "VirtioQueue", "TestSupport"]),
  tests("VirtioTransportTests", ["VirtioSpec", "VirtioTransport", "TestSupport"]),
  tests("BootTests", ["HostSystem", "VMMemory", "Boot", "TestSupport"]),
  tests(
    "BackendKitTests",
    ["CLinux", "HostSystem", "VirtioSpec", "VMMemory", "VhostUser", "VirtioQueue", "BackendKit", "BackendTesting", "TestSupport"]),
  tests("FrontEndTests", ["CLinux", "HostSystem", "VirtioSpec", "VMMemory", "VhostUser", "VirtioTransport", "FrontEnd", "TestSupport"]),
  tests("SupervisionTests", ["CLinux", "HostSystem", "Sandbox", "ControlProtocol", "Supervision", "TestSupport"]),
  tests("MachineTests", ["CLinux", "HostSystem", "VirtioSpec", "VMMemory", "KVM", "VirtioTransport", "Boot", "Machine", "TestSupport"]),
  tests(
    "BlockDeviceTests",
    ["CLinux", "HostSystem", "VirtioSpec", "VMMemory", "VhostUser", "VirtioQueue", "DiskImage", "BackendKit", "BlockDevice", "TestSupport"]),
  tests(
    "NetDeviceTests",
    ["CLinux", "HostSystem", "VirtioSpec", "VMMemory", "VhostUser", "VirtioQueue", "BackendKit", "NetDevice", "TestSupport"]),
  tests(
    "ConsoleDeviceTests",
    ["CLinux", "HostSystem", "VirtioSpec", "VMMemory", "VhostUser", "VirtioQueue", "BackendKit", "ConsoleDevice", "TestSupport"]),
  // A back end with one defect of choice, run by the tests of the probe.
  .executableTarget(
    name: "broken-backend",
    dependencies: ["CLinux", "HostSystem", "VirtioSpec", "VMMemory", "VhostUser", "VirtioQueue"].map { .byName(name: $0) },
    path: "Tests/BrokenBackend", swiftSettings: [.swiftLanguageMode(.v6), .treatAllWarnings(as: .error)], linkerSettings: staticPIE),
  tests(
    "ProbeTests",
    ["CLinux", "HostSystem", "VirtioSpec", "VMMemory", "VhostUser", "VirtioQueue", "ControlProtocol", "BackendKit", "Probe", "TestSupport"]),
  tests("MonitorTests", everything + ["TestSupport"]),
  tests("ConformanceTests", everything + ["TestSupport"]),
  tests("IsolationTests", everything + ["CSandbox", "TestSupport"]),
  tests("GuestsTests", everything + ["TestSupport"]),
]

/// Only for `scripts/fuzz`, which builds them and what they need with coverage and a sanitizer, in a folder of its own.
let fuzzNeeds = [
  "CLinux", "HostSystem", "VirtioSpec", "VMMemory", "VhostUser", "Sandbox", "DiskImage", "ControlProtocol", "VirtioQueue",
  "VirtioTransport", "Boot", "BackendKit", "BlockDevice", "NetDevice", "ConsoleDevice", "Supervision", "Probe",
]
let fuzzTargets: [Target] =
  Context.environment["MARTLET_FUZZ"] == nil
  ? []
  : [
    .target(name: "CFuzz", path: "Tests/Fuzz/CFuzz", cSettings: [.unsafeFlags(["-Wall", "-Wextra", "-Werror"])]),
    .executableTarget(
      name: "martlet-fuzz", dependencies: (["CFuzz"] + fuzzNeeds).map { .byName(name: $0) }, path: "Tests/Fuzz/Targets",
      swiftSettings: [.swiftLanguageMode(.v6), .treatAllWarnings(as: .error)],
      linkerSettings: [.unsafeFlags(["-use-ld=lld", "-sanitize=fuzzer,address"])]),
  ]

let package = Package(
  name: "martlet",
  products: [
    .library(name: "MartletBackendKit", targets: ["BackendKit", "VirtioQueue", "VMMemory", "VhostUser", "VirtioSpec", "HostSystem"]),
    .library(name: "MartletBackendTesting", targets: ["BackendTesting"]),
  ],
  targets: layer0 + layer1 + layer2 + layer3 + layer4 + layer5 + programs + testTargets + fuzzTargets
)
