import VirtioSpec

/// What the supervisor tells the core. `protocol/control.md` has the bytes.
package enum SupervisorMessage: Equatable, Sendable {
  /// The first message. Descriptors: /dev/kvm, kernel, and the initramfs when `hasInitramfs`. Answered by
  /// `CoreMessage.ready` when the VM is built and the payload is checked.
  case configure(CoreConfiguration)
  /// One device; its back end has said READY. Descriptor: the connected vhost-user socket. Once the guest runs with all its
  /// devices, one more is plugged in, and answered by `plugged` or `refused`.
  case device(DeviceAssignment)
  /// A byte stream of the platform. Descriptor: a connected stream socket. Sent before `start`.
  case stream(StreamKind)
  /// Run the guest. So many devices come before or after this; a guest that looks at the PCI bus waits for them. Answered
  /// by `CoreMessage.started` when all of them are on the bus.
  case start(deviceCount: UInt16)
  /// Stop the vCPUs at an instruction boundary. Answered by `done` when all have stopped.
  case pause
  /// Let the vCPUs go on. Answered by `done`.
  case resume
  /// Press the ACPI power button. Answered by `done`; the guest decides what follows.
  case powerButton
  /// Reset the VM as the reset button would. Answered by `done` when it runs again.
  case reboot
  /// End the VM now: stop vCPUs, take the rings back from the back ends, exit with 0. Answered by `done` first.
  case shutdown
  /// Answered by `information`.
  case information
  /// A back end has come back. Descriptor: its new vhost-user socket. Answered by `done` when it does what the one before
  /// did, or by `refused`.
  case reattach(id: String)
  /// No back end will come any more for a device that waits for one: the guest is told. Answered by `done`.
  case giveUp(id: String)
  /// A back end that might take over from the present one. Descriptor: its vhost-user socket. Answered by `examined`; without a
  /// refusal in it the core keeps the connection until `exchange` or `forget`.
  case examine(id: String)
  /// The examined back end takes over; the present one may take so many milliseconds to finish what is in flight. Answered by
  /// `done`, after which the connection to the old one is kept until `forget`, or by `refused`, after which the rings may stand
  /// still until `forget`.
  case exchange(id: String, drain: UInt32)
  /// The back end that is not needed any more has ended. Answered by `done`.
  case forget(id: String)
  /// The guest is to let go of a device; by force: the device goes, and the guest is told. Answered by `done` when nothing of
  /// it is left, however long the guest takes, or by `refused`.
  case unplug(id: String, isForced: Bool)
  /// See how far the rings of all devices are; what has changed is reported. Answered by `done` behind the reports.
  case look
  /// What was said to and by a device's back end lately. Answered by `conversation`.
  case conversation(id: String)

  /// The platform's byte streams.
  package enum StreamKind: UInt8, Equatable, Sendable {
    /// The 16550 at port 0x3F8.
    case serial = 0
  }
}

/// What the core needs to know about the VM before any device.
package struct CoreConfiguration: Equatable, Sendable {
  package var name: String
  package var cpuCount: UInt16
  package var memorySize: UInt64
  package var commandLine: String
  package var hasInitramfs: Bool
  /// False: no serial port in the guest. True without a `stream` message: its output is dropped.
  package var hasSerial: Bool
  /// False: a guest reset is reported and ends the VM.
  package var restartsOnReset: Bool
  /// Deadline for each answer of a back end, in milliseconds.
  package var replyDeadline: UInt32

  package init(
    name: String, cpuCount: UInt16, memorySize: UInt64, commandLine: String, hasInitramfs: Bool, hasSerial: Bool,
    restartsOnReset: Bool, replyDeadline: UInt32
  ) {
    self.name = name
    self.cpuCount = cpuCount
    self.memorySize = memorySize
    self.commandLine = commandLine
    self.hasInitramfs = hasInitramfs
    self.hasSerial = hasSerial
    self.restartsOnReset = restartsOnReset
    self.replyDeadline = replyDeadline
  }
}

/// One virtio-pci function and the vhost-user session behind it.
package struct DeviceAssignment: Equatable, Sendable {
  package var id: String
  package var deviceType: DeviceID
  /// The core chooses the slot.
  package static let anySlot: UInt8 = 0
  /// Device number on PCI bus 0, 1 to 31, or `anySlot` for a guest that runs.
  package var pciSlot: UInt8
  /// One entry per queue: the largest size offered to the guest.
  package var queueSizes: [UInt16]
  /// Virtio feature bits that may be offered to the guest if the back end has them.
  package var allowedFeatures: FeatureSet
  /// Feature bits that the core offers itself, whatever the back end says, because they concern only the config space
  /// it serves (net: MAC, STATUS). They are not sent to the back end.
  package var ownFeatures: FeatureSet
  /// Fixed config space bytes for devices whose back end does not keep it (net: MAC, status, mtu); empty when the back
  /// end answers GET_CONFIG.
  package var configuration: [UInt8]
  /// When the back end is lost while the guest runs, `reattach` or `giveUp` will follow; the guest is told nothing before.
  package var isReplaceable = false

  package init(
    id: String, deviceType: DeviceID, pciSlot: UInt8, queueSizes: [UInt16], allowedFeatures: FeatureSet = FeatureSet(rawValue: .max),
    ownFeatures: FeatureSet = [], configuration: [UInt8] = []
  ) {
    self.id = id
    self.deviceType = deviceType
    self.pciSlot = pciSlot
    self.queueSizes = queueSizes
    self.allowedFeatures = allowedFeatures
    self.ownFeatures = ownFeatures
    self.configuration = configuration
  }
}

extension SupervisorMessage {
  /// How many descriptors travel with the message.
  package var descriptorCount: Int {
    switch self {
    case .configure(let configuration): configuration.hasInitramfs ? 3 : 2
    case .device, .stream, .reattach, .examine: 1
    case .start, .pause, .resume, .powerButton, .reboot, .shutdown, .information, .giveUp, .exchange, .forget, .unplug, .look,
      .conversation:
      0
    }
  }

  private enum Kind: UInt16 {
    case configure = 1, device, stream, start, pause, resume, powerButton, reboot, shutdown, information, reattach, giveUp, unplug,
      look, conversation
    case examine = 20
    case exchange, forget
  }

  private var kind: Kind {
    switch self {
    case .configure: .configure
    case .device: .device
    case .stream: .stream
    case .start: .start
    case .pause: .pause
    case .resume: .resume
    case .powerButton: .powerButton
    case .reboot: .reboot
    case .shutdown: .shutdown
    case .information: .information
    case .reattach: .reattach
    case .giveUp: .giveUp
    case .examine: .examine
    case .exchange: .exchange
    case .forget: .forget
    case .unplug: .unplug
    case .look: .look
    case .conversation: .conversation
    }
  }

  /// The packet. `sequence` comes back in the answer.
  package func encode(sequence: UInt32) -> [UInt8] {
    var writer = WireWriter()
    WireHeader(kind: kind.rawValue, descriptorCount: descriptorCount, sequence: sequence).write(to: &writer)
    switch self {
    case .configure(let configuration):
      writer.number(Wire.version)
      writer.number(configuration.cpuCount)
      writer.number(configuration.memorySize)
      writer.number(configuration.replyDeadline)
      writer.flag(configuration.hasInitramfs)
      writer.flag(configuration.hasSerial)
      writer.flag(configuration.restartsOnReset)
      writer.text(configuration.name)
      writer.text(configuration.commandLine)
    case .device(let device):
      writer.number(device.deviceType.rawValue)
      writer.number(device.pciSlot)
      writer.number(device.allowedFeatures.rawValue)
      writer.number(device.ownFeatures.rawValue)
      writer.text(device.id)
      writer.list(device.queueSizes) { $0.number($1) }
      writer.list(device.configuration) { $0.number($1) }
      writer.flag(device.isReplaceable)
    case .stream(let stream): writer.number(stream.rawValue)
    case .reattach(let id), .giveUp(let id), .conversation(let id), .examine(let id), .forget(let id): writer.text(id)
    case .exchange(let id, let drain):
      writer.text(id)
      writer.number(drain)
    case .unplug(let id, let isForced):
      writer.text(id)
      writer.flag(isForced)
    case .start(let deviceCount): writer.number(deviceCount)
    case .pause, .resume, .powerButton, .reboot, .shutdown, .information, .look: break
    }
    return writer.bytes
  }

  /// Reads a packet that came with `descriptorCount` descriptors.
  package static func decode(
    _ packet: [UInt8], descriptorCount: Int
  ) throws(MessageError) -> (message: SupervisorMessage, sequence: UInt32) {
    guard packet.count <= Wire.maximumLength else { throw .tooLong(byteCount: packet.count) }
    var reader = WireReader(packet)
    let header = try WireHeader(from: &reader)
    guard let kind = Kind(rawValue: header.kind) else { throw .unknownKind(header.kind) }
    let message: SupervisorMessage
    switch kind {
    case .configure: message = .configure(try CoreConfiguration(from: &reader))
    case .device: message = .device(try DeviceAssignment(from: &reader))
    case .stream:
      guard let stream = StreamKind(rawValue: try reader.number()) else { throw .badField("stream") }
      message = .stream(stream)
    case .start:
      let deviceCount: UInt16 = try reader.number()
      guard deviceCount <= 31 else { throw .badField("deviceCount") }
      message = .start(deviceCount: deviceCount)
    case .pause: message = .pause
    case .resume: message = .resume
    case .powerButton: message = .powerButton
    case .reboot: message = .reboot
    case .shutdown: message = .shutdown
    case .information: message = .information
    case .reattach: message = .reattach(id: try reader.identifier())
    case .giveUp: message = .giveUp(id: try reader.identifier())
    case .examine: message = .examine(id: try reader.identifier())
    case .exchange:
      let id = try reader.identifier()
      let drain: UInt32 = try reader.number()
      guard (1...UInt32(VMConfiguration.Limits.milliseconds)).contains(drain) else { throw .badField("drain") }
      message = .exchange(id: id, drain: drain)
    case .forget: message = .forget(id: try reader.identifier())
    case .unplug: message = .unplug(id: try reader.identifier(), isForced: try reader.flag("isForced"))
    case .look: message = .look
    case .conversation: message = .conversation(id: try reader.identifier())
    }
    try reader.finish()
    try header.checkDescriptors(expected: message.descriptorCount, received: descriptorCount)
    return (message, header.sequence)
  }
}

extension CoreConfiguration {
  fileprivate init(from reader: inout WireReader) throws(MessageError) {
    guard try reader.number(UInt16.self) == Wire.version else { throw .badField("version") }
    cpuCount = try reader.number()
    guard (1...VMConfiguration.Limits.cpus).contains(Int(cpuCount)) else { throw .badField("cpus") }
    memorySize = try reader.number()
    let range = VMConfiguration.Limits.smallestMemory...VMConfiguration.Limits.largestMemory
    guard range.contains(memorySize), memorySize % 4096 == 0 else { throw .badField("memory") }
    replyDeadline = try reader.number()
    guard (1...VMConfiguration.Limits.milliseconds).contains(UInt64(replyDeadline)) else {
      throw .badField("replyDeadline")
    }
    hasInitramfs = try reader.flag("initramfs")
    hasSerial = try reader.flag("serial")
    restartsOnReset = try reader.flag("restartsOnReset")
    name = try reader.identifier()
    commandLine = try reader.text("cmdline", limit: VMConfiguration.Limits.commandLine)
    guard !commandLine.utf8.contains(0) else { throw .badField("cmdline") }
  }
}

extension DeviceAssignment {
  fileprivate init(from reader: inout WireReader) throws(MessageError) {
    deviceType = DeviceID(rawValue: try reader.number())
    guard (1...DeviceID.greatest).contains(deviceType.rawValue) else { throw .badField("deviceType") }
    pciSlot = try reader.number()
    guard (0...31).contains(pciSlot) else { throw .badField("pciSlot") }
    allowedFeatures = FeatureSet(rawValue: try reader.number())
    ownFeatures = FeatureSet(rawValue: try reader.number())
    id = try reader.identifier()
    queueSizes = try reader.list("queueSizes", limit: VMConfiguration.Limits.queues) { reader throws(MessageError) in
      guard let size = VMConfiguration.checkedQueueSize(UInt64(try reader.number(UInt16.self))) else {
        throw .badField("queueSizes")
      }
      return size
    }
    guard !queueSizes.isEmpty else { throw .badField("queueSizes") }
    configuration = try reader.list("configuration", limit: 256) { reader throws(MessageError) in try reader.number() }
    isReplaceable = try reader.flag("isReplaceable")
  }
}

extension WireReader {
  /// The name of a VM or a device.
  package mutating func identifier() throws(MessageError) -> String {
    let text = try text("id", limit: VMConfiguration.Limits.name)
    guard VMConfiguration.isName(text) else { throw .badField("id") }
    return text
  }
}
