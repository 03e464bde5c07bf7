import VirtioSpec

/// One VM as the command line describes it, checked as far as text can be checked: every number is in range, every name
/// and path is well formed, ids are unique. Nothing has been opened.
package struct VMConfiguration: Equatable, Sendable {
  /// What the parser and the core hold themselves to.
  package enum Limits {
    /// xAPIC ids are 8 bits wide and 255 is the broadcast.
    package static let cpus = 254
    /// Smallest memory in bytes: what lies below 1 MiB, and a small payload.
    package static let smallestMemory: UInt64 = 4 << 20
    /// Largest memory in bytes: KVM's memory slots count pages with 31 bits (`KVM_MEM_MAX_NR_PAGES`).
    package static let largestMemory: UInt64 = 8 << 40
    /// PCI bus 0 has 32 slots; slot 0 is the host bridge.
    package static let devices = 31
    /// vhost-user names a queue with 8 bits in its kick and call messages.
    package static let queues = 256
    package static let queueSize: UInt64 = 32768
    /// COMMAND_LINE_SIZE of x86 is 2048 with the terminating NUL.
    package static let commandLine = 2047
    package static let name = 32
    /// VIRTIO_BLK_ID_BYTES.
    package static let serial = 20
    /// `tag` of struct virtio_fs_config.
    package static let tag = 36
    /// IFNAMSIZ without the NUL.
    package static let interfaceName = 15
    package static let milliseconds: UInt64 = 600_000
    /// Queues of a disk that does not say: one for each processor, up to as many as `martlet-block` has. Each has a thread and a ring.
    package static let defaultDiskQueues = 64
  }

  /// What follows when a device's back end dies under a running guest.
  package struct DeathPolicy: Equatable, Sendable {
    package enum Action: String, CaseIterable, Sendable {
      /// A new process takes over; the guest notices a pause. For a socket: connect again, as long as it takes.
      case restart
      /// The device waits; the guest is told nothing.
      case hold
      /// The guest is told that the device needs a reset; the VM lives.
      case fail
      /// The VM ends.
      case stopVM = "stop-vm"
    }
    package var action = Action.restart
    /// More deaths of a process within a minute are a failure for good.
    package var limit = 5
    /// A process waits beside the one that serves, to take over.
    package var hasSpare = false
    /// Of a back end at a socket, in milliseconds: how long it is waited for. Nil: not at all at the start, for ever later.
    package var patience: UInt64?
  }

  /// A back end of somebody else's that the supervisor starts, in a jail.
  package struct JailedProgram: Equatable, Sendable {
    /// The program and its arguments, with `{fd}`, `{listen}`, `{socket}`, `{path}`, `{id}` and `{name}` still in them.
    package var words: [String]
    /// Path of its profile.
    package var profile: String
    /// The file or directory that it serves.
    package var path: String?

    package init(words: [String], profile: String, path: String? = nil) {
      self.words = words
      self.profile = profile
      self.path = path
    }

    /// How it gets its vhost-user connection.
    package enum Convention: String, CaseIterable, Sendable {
      /// The number of a connected socket.
      case connected = "{fd}"
      /// The number of a listening socket on which a connection already waits.
      case listening = "{listen}"
      /// A path at which it listens itself.
      case path = "{socket}"
    }

    package var convention: Convention? {
      Convention.allCases.first { convention in words.contains { Self.contains($0, convention.rawValue) } }
    }

    package static func contains(_ word: String, _ part: String) -> Bool {
      let word = Array(word.utf8)
      let part = Array(part.utf8)
      guard word.count >= part.count else { return false }
      return (0...(word.count - part.count)).contains { word[$0..<($0 + part.count)].elementsEqual(part) }
    }
  }

  /// Who serves a device that none of our programs serves.
  package enum External: Equatable, Sendable {
    /// A back end started by someone else, listening on this socket.
    case socket(String)
    case program(JailedProgram)
  }

  package struct Disk: Equatable, Sendable {
    package enum Source: Equatable, Sendable {
      case image(path: String, readOnly: Bool)
      case external(External)
    }
    package var id: String
    package var source: Source
    /// What GET_ID answers, at most 20 bytes; nil for the default (the id).
    package var serial: String?
    /// What the keys of the option mean to the block program, as its arguments.
    package var backEndArguments: [String] = []
    package static let rawArgument = "--blk-format=raw"
    /// Its bytes are the disk, whatever they look like.
    package var isRaw: Bool { backEndArguments.contains(Self.rawArgument) }
    /// Others may write the image while the guest reads it.
    package var isShared = false
    package var queueCount: UInt16
    package var queueSize: UInt16
    package var death = DeathPolicy()
  }

  package struct Net: Equatable, Sendable {
    package enum Source: Equatable, Sendable {
      case tap(String)
      case external(External)
    }
    package var id: String
    package var source: Source
    /// Six bytes; nil lets the supervisor derive one from VM name and id.
    package var mac: [UInt8]?
    package var queueSize: UInt16
    package var death = DeathPolicy()
  }

  /// A directory of the host that a file system daemon serves (virtiofsd).
  package struct FileSystem: Equatable, Sendable {
    package var id: String
    /// What the guest mounts it by.
    package var tag: String
    package var source: External
    /// Request queues; one for urgent requests comes on top.
    package var queueCount: UInt16
    package var queueSize: UInt16
    package var death = DeathPolicy()
  }

  /// A source of random bytes for the guest.
  package struct Entropy: Equatable, Sendable {
    package var id: String
    /// A character device.
    package var source: String
    package var death = DeathPolicy()
  }

  package struct GenericVhostUser: Equatable, Sendable {
    package var id: String
    package var source: External
    package var deviceType: DeviceID
    package var queueSizes: [UInt16]
    package var death = DeathPolicy()
  }

  /// Where the bytes of a console or of the serial port go on the host.
  package enum Terminal: Equatable, Sendable {
    /// The terminal (or pipe) that `martlet run` was started on.
    case tty
    /// A new pseudo-terminal whose path is printed.
    case pty
    case file(String)
    /// A listening Unix socket, made by the supervisor.
    case socket(String)
    /// Output is dropped, no input.
    case null
    /// The device does not exist.
    case off
  }

  /// A console beside the first one, added while the VM runs.
  package struct Console: Equatable, Sendable {
    package var id: String
    package var terminal: Terminal
    package var death = DeathPolicy()
  }

  package struct Deadlines: Equatable, Sendable {
    /// From the start of a process to its READY, in milliseconds.
    package var ready: UInt32 = 5000
    /// For connecting to a socket of an external back end, in milliseconds.
    package var connect: UInt32 = 2000
    /// For each answer of a back end, in milliseconds.
    package var reply: UInt32 = 5000
    /// For writes of a dead block process to end before another one may write, in milliseconds.
    package var fence: UInt32 = 60_000
  }

  /// How the processes are walled in.
  package enum Sandbox: String, CaseIterable, Sendable {
    case on, off
    /// What the walls forbid is done and written to the kernel's log.
    case log
  }

  /// Where the processes' control groups are made.
  package enum ControlGroup: Equatable, Sendable {
    /// In the group that we run in, if it is ours alone.
    case own
    case below(String)
    case off
  }

  package var name = "vm"
  package var kernel = ""
  package var initramfs: String?
  package var commandLine = ""
  package var cpuCount = 1
  package var memorySize: UInt64 = 512 << 20
  package var disks: [Disk] = []
  package var nets: [Net] = []
  package var fileSystems: [FileSystem] = []
  package var entropy: Entropy?
  package var generics: [GenericVhostUser] = []
  package var console: Terminal = .tty
  package var consoleDeath = DeathPolicy()
  package var consoles: [Console] = []
  /// How the devices have come to differ from the command line.
  package internal(set) var changes: [DeviceChange] = []
  package var serial: Terminal = .null
  /// Socket path for `martlet ctl`.
  package var control: String?
  /// Directory for recordings of conversations with back ends that were lost.
  package var flightRecorder: String?
  package var restartsOnReset = true
  package var deadlines = Deadlines()
  /// The supervisor may be killed, and another takes over; otherwise all ends with it.
  package var outlivesSupervisor = false
  /// nil: not said.
  package var sandbox: Sandbox?
  /// No start without the full set of walls.
  package var isHardened = false
  package var controlGroup = ControlGroup.own
  /// By device, where there are any.
  package var limits: [String: ResourceLimits] = [:]
  /// First uid of the range for this VM's processes; nil lets the supervisor choose.
  package var uidBase: UInt32?

  /// Reads the arguments of `martlet run` (without the verb).
  package init(arguments: [String]) throws(ConfigurationError) {
    var draft = Draft()
    try VMConfiguration.optionTable.apply(arguments, to: &draft)
    self = try draft.finish()
  }

  init() {}

  /// Who serves the device; nil for our own programs.
  package func external(of id: String) -> External? {
    for disk in disks { if disk.id == id, case .external(let external) = disk.source { return external } }
    for net in nets { if net.id == id, case .external(let external) = net.source { return external } }
    for fileSystem in fileSystems where fileSystem.id == id { return fileSystem.source }
    return generics.first { $0.id == id }?.source
  }

  /// The socket of the external back end that serves the device; nil for devices of our own and programs we start.
  package func externalSocket(of id: String) -> String? {
    if case .socket(let path) = external(of: id) { return path }
    return nil
  }

  /// Somebody else's program that serves the device.
  package func jailedProgram(of id: String) -> JailedProgram? {
    if case .program(let program) = external(of: id) { return program }
    return nil
  }

  /// What follows when the device's back end dies.
  package func deathPolicy(of id: String) -> DeathPolicy {
    for disk in disks where disk.id == id { return disk.death }
    for net in nets where net.id == id { return net.death }
    for fileSystem in fileSystems where fileSystem.id == id { return fileSystem.death }
    if let entropy, entropy.id == id { return entropy.death }
    for console in consoles where console.id == id { return console.death }
    for generic in generics where generic.id == id { return generic.death }
    return id == Reserved.console ? consoleDeath : DeathPolicy()
  }

  /// Devices that take a PCI slot and a vhost-user session.
  package var deviceCount: Int {
    deviceIDs.count
  }
}

extension VMConfiguration {
  package static let nameRule = "1 to 32 letters, digits, '.', '_' or '-', not beginning with '.' or '-'"

  package static func isName(_ text: String) -> Bool {
    guard let first = text.utf8.first, first != UInt8(ascii: "."), first != UInt8(ascii: "-") else { return false }
    return text.utf8.count <= Limits.name
      && text.utf8.allSatisfy { byte in
        switch byte {
        case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"),
          UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "."), UInt8(ascii: "_"), UInt8(ascii: "-"):
          true
        default: false
        }
      }
  }

  package static func isPath(_ text: String) -> Bool {
    (1...4095).contains(text.utf8.count) && !text.utf8.contains(0)
  }

  package static func isSocketPath(_ text: String) -> Bool { isPath(text) && text.utf8.count <= 107 }

  package static func checkedQueueSize(_ number: UInt64) -> UInt16? {
    guard (2...Limits.queueSize).contains(number), number & (number - 1) == 0 else { return nil }
    return UInt16(number)
  }

  /// `52:54:00:12:34:56`: six pairs of hexadecimal digits, a unicast address, not all zero.
  package static func mac(_ text: String) -> [UInt8]? {
    let groups = text.split(separator: ":", omittingEmptySubsequences: false)
    guard groups.count == 6 else { return nil }
    var bytes: [UInt8] = []
    for group in groups {
      let digits = group.utf8.compactMap(Quantity.hexadecimalDigit)
      guard digits.count == 2, group.utf8.count == 2 else { return nil }
      bytes.append(digits[0] << 4 | digits[1])
    }
    guard bytes[0] & 1 == 0, bytes.contains(where: { $0 != 0 }) else { return nil }
    return bytes
  }
}
