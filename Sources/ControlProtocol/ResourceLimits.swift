/// What the process of one device may use of the host; nil: as much as there is. Kept by the kernel, in a control group.
package struct ResourceLimits: Equatable, Sendable {
  /// Processor time in percent of one processor.
  package var processorPercent: UInt64?
  /// Share of processor time and of storage when others want it too, 1 to 10000; the kernel's 100 when nil.
  package var processorWeight: UInt64?
  package var storageWeight: UInt64?
  /// Bytes of memory. Guest memory that this process touches first counts.
  package var memory: UInt64?
  /// Threads, with those of the kernel's rings.
  package var threads: UInt64?
  /// Bytes a second from and to the disk that the image lies on.
  package var readRate: UInt64?
  package var writeRate: UInt64?

  package init() {}

  package var isEmpty: Bool { self == ResourceLimits() }

  /// What a process that maps guest memory needs beside it, at the least.
  package static let leastMemory: UInt64 = 16 << 20

  static let keys = [
    KeyDescription("cpu-limit", "PERCENT%", "processor time of its process: 50% is half a processor, 200% two"),
    KeyDescription("cpu-weight", "1-10000", "its share when others want it too; 100 when left out"),
    KeyDescription("memory-limit", "SIZE", "memory of its process, guest memory that it touches first included"),
    KeyDescription("pids-limit", "N", "threads of its process"),
  ]
  static let storageKeys = [
    KeyDescription("io-weight", "1-10000", "its share of the storage; 100 when left out"),
    KeyDescription("io-read-limit", "SIZE", "bytes a second from the disk below the image, by the kernel"),
    KeyDescription("io-write-limit", "SIZE", "bytes a second to it, by the kernel"),
  ]
}

extension ResourceLimits {
  /// Limits without a device: `cpu-limit=50%,pids-limit=8`.
  package init(option: String, _ text: String) throws(ConfigurationError) {
    let table = OptionTable<ResourceLimits>([
      OptionDescription(
        option, .list(keys: Self.keys + Self.storageKeys), group: "", summary: "", example: "--\(option) cpu-limit=50%,memory-limit=1G"
      ) { (limits, values) throws(ConfigurationError) in limits = try values.limits() }
    ])
    self.init()
    try table.apply(["--\(option)=\(text)"], to: &self)
  }
}

extension OptionValues {
  func limits() throws(ConfigurationError) -> ResourceLimits {
    var limits = ResourceLimits()
    if let text = self["cpu-limit"] {
      guard text.last == "%", let percent = Quantity.unsigned(String(text.dropLast())), (1...100_000).contains(percent) else {
        throw bad("cpu-limit", "percent of one processor from 1% to 100000%")
      }
      limits.processorPercent = percent
    }
    limits.processorWeight = try number("cpu-weight", in: 1...10_000)
    limits.storageWeight = try number("io-weight", in: 1...10_000)
    limits.threads = try number("pids-limit", in: 1...1_000_000)
    limits.memory = try rate("memory-limit", "bytes from 16M to 1024T, such as 1G", from: ResourceLimits.leastMemory)
    limits.readRate = try rate("io-read-limit", "bytes a second from 4K to 1024T, such as 100M", from: 4096)
    limits.writeRate = try rate("io-write-limit", "bytes a second from 4K to 1024T, such as 100M", from: 4096)
    return limits
  }

  private func rate(_ key: String, _ expected: String, from least: UInt64) throws(ConfigurationError) -> UInt64? {
    guard let text = self[key] else { return nil }
    guard let count = Quantity.byteCount(text), (least...(1 << 50)).contains(count) else { throw bad(key, expected) }
    return count
  }
}

extension VMConfiguration {
  /// What a device's process may use; of processes that were not asked for by an option, everything.
  package func limits(of id: String) -> ResourceLimits { limits[id] ?? ResourceLimits() }

  /// Who maps guest memory may be the one that touches it first, and then all of it counts as that process's.
  func checkLimits() throws(ConfigurationError) {
    for (id, limits) in limits.sorted(by: { $0.key < $1.key }) {
      guard let memory = limits.memory else { continue }
      let (needed, overflow) = memorySize.addingReportingOverflow(ResourceLimits.leastMemory)
      guard overflow || memory < needed else { continue }
      throw .badValue(
        place: "memory-limit of \(id)", value: Quantity.describe(byteCount: memory),
        expected: "at least \(Quantity.describe(byteCount: needed)): guest memory that its process touches first counts as its own")
    }
    for id in limits.keys where externalSocket(of: id) != nil {
      throw .conflict(
        "limits of \(id)", "its socket=", remedy: "a back end that others started is not ours to limit; limit it where it is started")
    }
  }
}
