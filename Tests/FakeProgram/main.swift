// Plays the core or a device program in tests of the supervisor. Which of them: by the program name it was started with.
// How it behaves: by words in the VM's name, because that is the only thing that reaches every process of a VM.

import ControlProtocol
import Glibc
import HostSystem
import Sandbox
import VirtioSpec

let arguments = OwnProgram.arguments

func value(_ option: String) -> String? {
  arguments.first { $0.hasPrefix("--\(option)=") }.map { String($0.dropFirst(option.utf8.count + 3)) }
}

let title = value("title") ?? ""
let parts = title.split(separator: "/")
let behaviour = parts.count == 3 ? String(parts[1]) : ""
let program = arguments.first ?? ""
if program == "martlet-supervisor" { playSuccessor() }
try ProcessWalls.raise(title: title)

if program == "martlet-core" {
  try FakeCore(behaviour).run()
} else {
  try runDevice()
}

/// A new supervisor program that is asked whether it can take a VM over; the VM's name, which is in the state, says how it behaves.
/// Behind the supervisor's filter: it may do little.
func playSuccessor() -> Never {
  // It says yes, and its spawner does not come up.
  if !arguments.contains("--martlet-upgrade=examine") { _exit(0) }
  var state = [UInt8](repeating: 0, count: 1 << 16)
  // SAFETY: the buffer is lent for the call.
  _ = unsafe state.withUnsafeMutableBytes { unsafe read(3, $0.baseAddress, $0.count) }
  let text = String(decoding: state, as: UTF8.self)
  func answer(_ words: String) {
    let bytes = Array(words.utf8)
    // SAFETY: the array is lent for the call.
    _ = unsafe bytes.withUnsafeBytes { unsafe write(1, $0.baseAddress, $0.count) }
  }
  if text.contains("up-crash"), let nowhere = unsafe UnsafeMutablePointer<Int>(bitPattern: 8) { unsafe nowhere.pointee = 1 }
  if text.contains("up-call") { _ = getppid() }
  if text.contains("up-hang") { while true { _ = poll(nil, 0, 60_000) } }
  if text.contains("up-refuse") {
    answer("It reads states of version 9, and this VM's supervisor writes version 1\n")
    _exit(1)
  }
  if text.contains("up-half") { answer("state accepted\n") }
  _exit(0)
}

func die(_ signal: Int32) -> Never {
  kill(getpid(), signal)
  // The first process of a pid namespace cannot send itself signals; a fault ends it all the same.
  if signal == SIGSEGV, let nowhere = unsafe UnsafeMutablePointer<Int>(bitPattern: 8) { unsafe nowhere.pointee = 1 }
  while true { sleep(1) }
}

func runDevice() throws {
  let isMeant = program == "martlet-block"
  switch behaviour {
  case "dev-never" where isMeant: while true { sleep(60) }
  case "dev-crash" where isMeant: exit(3)
  case "dev-quiet" where isMeant: exit(0)
  case "dev-refuse" where isMeant:
    Log.error("Cannot serve")
    exit(1)
  case "dev-early-eof" where isMeant:
    close(4)
    while true { sleep(60) }
  case "dev-stay" where isMeant: _ = signal(SIGTERM, SIG_IGN)
  default: break
  }
  let socket = try OwnedFD.inherited(3)
  do {
    let ready = try OwnedFD.inherited(4)
    try ready.writeAll(Array("READY\n".utf8))
  }
  if behaviour == "dev-violate", isMeant {
    usleep(200_000)
    try ProcessWalls.closeCalls([.base, .device], .on)
    _ = try? OwnedFD.open("/etc/passwd", O_RDONLY)
  }
  if behaviour == "dev-die", isMeant {
    usleep(200_000)
    die(SIGSEGV)
  }
  var buffer = [UInt8](repeating: 0, count: 256)
  while true {
    // SAFETY: the buffer is lent for the call.
    switch unsafe buffer.withUnsafeMutableBytes({ unsafe socket.read(into: $0) }) {
    case .bytes, .wouldBlock: continue
    default:
      if behaviour == "dev-stay", isMeant { while true { sleep(60) } }
      exit(0)
    }
  }
}

final class FakeCore {
  let socket: OwnedFD
  let behaviour: String
  var devices: [DeviceAssignment] = []
  var state = VMInformation.State.created
  var pendingStart: (sequence: UInt32, deviceCount: Int)?
  /// Kept open as the real core keeps them.
  var kept: [CInt] = []

  init(_ behaviour: String) throws {
    socket = try OwnedFD.inherited(3)
    self.behaviour = behaviour
  }

  func send(_ message: CoreMessage, _ sequence: UInt32 = 0) { _ = UnixSocket.send(socket, message.encode(sequence: sequence)) }

  func run() throws {
    var buffer = [UInt8](repeating: 0, count: Wire.maximumLength)
    while true {
      let (count, message, sequence) = try unsafe buffer.withUnsafeMutableBytes { bytes in
        var reception = unsafe UnixSocket.receive(socket, into: bytes, waiting: true)
        guard case .bytes(let count) = reception.transfer else { return (0, SupervisorMessage.information, UInt32(0)) }
        let descriptors = reception.descriptors.count
        while let fd = reception.descriptors.takeFirst() { kept.append(fd.release()) }
        let packet = unsafe Array(bytes[..<count])
        let (message, sequence) = try SupervisorMessage.decode(packet, descriptorCount: descriptors)
        return (count, message, sequence)
      }
      if count == 0 { exit(0) }
      handle(message, sequence)
    }
  }

  func handle(_ message: SupervisorMessage, _ sequence: UInt32) {
    switch message {
    case .configure:
      switch behaviour {
      case "core-hang": return
      case "core-early": exit(3)
      case "core-input": fail(.input, "Kernel file is cut short; copy the file again.")
      case "core-host": fail(.host, "KVM lacks KVM_CAP_IRQFD")
      case "core-late":
        // By now device messages are waiting, which we never read.
        usleep(200_000)
        fail(.input, "Kernel has no PVH entry")
      case "core-garbage":
        _ = UnixSocket.send(socket, [1, 2, 3])
        while true { sleep(60) }
      default: send(.ready, sequence)
      }
    case .unplug(let id, _):
      devices.removeAll { $0.id == id }
      send(.unplugged(id: id))
      send(.done, sequence)
    case .device(let device) where device.pciSlot == DeviceAssignment.anySlot:
      devices.append(device)
      send(.plugged(slot: UInt8(devices.count)), sequence)
    case .device(let device):
      devices.append(device)
      report(device, .connecting)
      startIfComplete()
    case .stream: break
    case .start(let deviceCount):
      if behaviour == "core-device" { fail(.device, "Device blk0: The peer did not answer GET_FEATURES within 5000 ms") }
      state = .running
      pendingStart = (sequence, Int(deviceCount))
      startIfComplete()
    case .pause:
      if state == .paused { return send(.refused("The VM is paused already"), sequence) }
      state = .paused
      send(.done, sequence)
    case .resume:
      state = .running
      send(.done, sequence)
    case .powerButton:
      send(.done, sequence)
      end(.poweredOff)
    case .reboot:
      send(.done, sequence)
      send(.guest(.reset))
    case .shutdown:
      if behaviour == "core-stay" { return }
      send(.done, sequence)
      end(.shutDown)
    case .information:
      if behaviour == "core-mute" { return }
      let counters = [VMInformation.Counter(name: "descriptors", value: UInt64(kept.count))]
      send(.information(VMInformation(state: state, resetCount: 2, uptime: 1_500_000_000, counters: counters)), sequence)
    case .examine: send(.examined([]), sequence)
    case .reattach, .giveUp, .exchange, .forget, .look: send(.done, sequence)
    case .conversation(let id): send(.conversation(id: id, text: "martlet-recording 2\n"), sequence)
    }
  }

  func startIfComplete() {
    guard let (sequence, count) = pendingStart, devices.count == count else { return }
    pendingStart = nil
    send(.started, sequence)
    for device in devices { report(device, .active) }
    switch behaviour {
    case "core-die": die(SIGSEGV)
    case "guest-off": end(.poweredOff)
    case "guest-reset": end(.resetEnded)
    case "guest-crash": end(.crashed)
    default: break
    }
  }

  func report(_ device: DeviceAssignment, _ state: DeviceReport.State) {
    send(
      .device(
        DeviceReport(
          id: device.id, state: state, features: [.version1, .eventIndex], protocolFeatures: 1 << 3,
          queues: device.queueSizes.map { .init(size: $0, isEnabled: state == .active) })))
  }

  func fail(_ kind: CoreMessage.FailureKind, _ sentence: String) -> Never {
    send(.failed(kind, sentence))
    exit(1)
  }

  func end(_ event: CoreMessage.GuestEvent) -> Never {
    send(.guest(event))
    exit(0)
  }
}
