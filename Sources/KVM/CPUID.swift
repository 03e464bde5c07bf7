import CLinux

/// A guest's CPUID: the entries of KVM_SET_CPUID2.
package struct CPUIDTable: Equatable, Sendable {
  package struct Entry: Equatable, Sendable {
    package var function: UInt32
    package var index: UInt32
    /// Bit 0: the index is significant.
    package var flags: UInt32
    package var eax: UInt32
    package var ebx: UInt32
    package var ecx: UInt32
    package var edx: UInt32

    package init(
      function: UInt32, index: UInt32 = 0, flags: UInt32 = 0, eax: UInt32 = 0, ebx: UInt32 = 0, ecx: UInt32 = 0,
      edx: UInt32 = 0
    ) {
      self.function = function
      self.index = index
      self.flags = flags
      self.eax = eax
      self.ebx = ebx
      self.ecx = ecx
      self.edx = edx
    }
  }

  package var entries: [Entry]

  package init(entries: [Entry]) {
    self.entries = entries
  }

  /// Decodes `struct kvm_cpuid2`: count, padding, then entries of 40 bytes.
  init(words: [UInt64]) {
    let count = min(Int(UInt32(truncatingIfNeeded: words[0])), (words.count - 1) / 5)
    entries = (0..<count).map { number in
      let at = 1 + number * 5
      func low(_ word: Int) -> UInt32 { UInt32(truncatingIfNeeded: words[at + word]) }
      func high(_ word: Int) -> UInt32 { UInt32(truncatingIfNeeded: words[at + word] >> 32) }
      return Entry(
        function: low(0), index: high(0), flags: low(1), eax: high(1), ebx: low(2), ecx: high(2), edx: low(3))
    }
  }

  /// Encodes `struct kvm_cpuid2`.
  var words: [UInt64] {
    var words: [UInt64] = [UInt64(entries.count)]
    words.reserveCapacity(1 + entries.count * 5)
    for entry in entries {
      words.append(UInt64(entry.function) | UInt64(entry.index) << 32)
      words.append(UInt64(entry.flags) | UInt64(entry.eax) << 32)
      words.append(UInt64(entry.ebx) | UInt64(entry.ecx) << 32)
      words.append(UInt64(entry.edx))
      words.append(0)
    }
    return words
  }

  package func entry(_ function: UInt32, index: UInt32 = 0) -> Entry? {
    entries.first { $0.function == function && $0.index == index }
  }

  /// Physical address bits a guest may use (leaf 0x8000_0008), 36 when not reported.
  package var physicalAddressBits: UInt8 {
    entry(0x8000_0008).map { UInt8(truncatingIfNeeded: $0.eax) } ?? 36
  }
}

/// What the fix-ups of a guest's CPUID depend on.
package struct ProcessorTopology: Equatable, Sendable {
  /// Processors of the machine; one package of single-threaded cores with ids from 0.
  package var count: Int
  /// `KVM_CAP_TSC_DEADLINE_TIMER`
  package var hasTSCDeadline: Bool
  /// Guest TSC frequency in kHz, for the timing leaf; nil leaves the leaf out.
  package var tscFrequency: UInt32?
  /// Whether the guest may use message destinations above 255.
  package var hasExtendedDestinations: Bool

  package init(count: Int, hasTSCDeadline: Bool, tscFrequency: UInt32?, hasExtendedDestinations: Bool) {
    self.count = count
    self.hasTSCDeadline = hasTSCDeadline
    self.tscFrequency = tscFrequency
    self.hasExtendedDestinations = hasExtendedDestinations
  }

  /// Bits of an APIC id: the core number's width.
  var idWidth: UInt32 {
    count <= 1 ? 0 : UInt32(Int.bitWidth - (count - 1).leadingZeroBitCount)
  }
}

extension CPUIDTable {
  /// The table common to all processors: topology, hypervisor leaves, features that KVM leaves to the user.
  /// `forProcessor(id:)` then fills in the ids.
  package func prepared(for topology: ProcessorTopology) -> CPUIDTable {
    var table = self
    let invariantTSC = entry(0x8000_0007).map { $0.edx & (1 << 8) != 0 } ?? false
    let count = UInt32(topology.count)
    table.entries.removeAll { $0.function == 0xB || $0.function == 0x1F || $0.function == 0x4000_0010 }
    for index in table.entries.indices {
      switch table.entries[index].function {
      case 0x1:
        // Keep the CLFLUSH size; ids are filled in per processor.
        table.entries[index].ebx = table.entries[index].ebx & 0x0000_FF00 | min(count, 255) << 16
        table.entries[index].ecx |= 1 << 31 | 1 << 21
        if topology.hasTSCDeadline { table.entries[index].ecx |= 1 << 24 }
        // No nested virtualization: bit 5 is VMX. OSXSAVE (27) is kept current by KVM.
        table.entries[index].ecx &= ~(1 << 5)
        table.entries[index].edx |= 1 << 12
        if count > 1 {
          table.entries[index].edx |= 1 << 28
        } else {
          table.entries[index].edx &= ~(1 << 28)
        }
      case 0x4, 0x8000_001D:
        guard table.entries[index].eax & 0x1F != 0 else { break }
        let level = table.entries[index].eax >> 5 & 7
        let sharing = level >= 3 ? min(count - 1, 4095) : 0
        table.entries[index].eax = table.entries[index].eax & 0x3FFF | sharing << 14
        if table.entries[index].function == 4 {
          table.entries[index].eax |= min(count - 1, 63) << 26
        }
      case 0x7 where table.entries[index].index == 0:
        // AMX needs a state permission that is not asked for; bits 6 and 13 mean "absent" and are always true.
        table.entries[index].edx &= ~(1 << 22 | 1 << 24 | 1 << 25)
        table.entries[index].ebx |= 1 << 6 | 1 << 13
      case 0xA:
        // No virtual performance counters.
        table.entries[index].eax = 0
        table.entries[index].ebx = 0
        table.entries[index].ecx = 0
        table.entries[index].edx = 0
      case 0x15, 0x16:
        // Host frequencies say nothing about the guest's time stamp counter.
        table.entries[index].eax = 0
        table.entries[index].ebx = 0
        table.entries[index].ecx = 0
      case 0x4000_0000 where invariantTSC && topology.tscFrequency != nil:
        table.entries[index].eax = max(table.entries[index].eax, 0x4000_0010)
      case 0x4000_0001:
        if topology.hasExtendedDestinations { table.entries[index].eax |= 1 << 15 }
      case 0x8000_0001:
        table.entries[index].ecx &= ~(1 << 2)
      case 0x8000_0008:
        if isAMD { table.entries[index].ecx = min(count - 1, 255) | topology.idWidth << 12 }
      default: break
      }
    }
    let maximum = entry(0)?.eax ?? 0
    if maximum >= 0xB {
      table.entries += [
        Entry(function: 0xB, index: 0, flags: 1, eax: 0, ebx: 1, ecx: 0x100),
        Entry(function: 0xB, index: 1, flags: 1, eax: topology.idWidth, ebx: count, ecx: 0x201),
        Entry(function: 0xB, index: 2, flags: 1, ecx: 0x002),
      ]
    }
    if invariantTSC, let frequency = topology.tscFrequency, entry(0x4000_0000) != nil {
      // KVM's local APIC timer counts nanoseconds: 1 GHz, in kHz.
      table.entries.append(Entry(function: 0x4000_0010, eax: frequency, ebx: 1_000_000))
    }
    table.fillInHostLeaves()
    return table
  }

  /// Brand string and cache descriptions, which KVM may leave empty.
  private mutating func fillInHostLeaves() {
    for index in entries.indices {
      let function = entries[index].function
      guard (0x8000_0002...0x8000_0006).contains(function), entries[index].eax | entries[index].ebx == 0,
        entries[index].ecx | entries[index].edx == 0
      else { continue }
      var registers: (UInt32, UInt32, UInt32, UInt32) = (0, 0, 0, 0)
      // SAFETY: four 32-bit values of ours, which the C function fills.
      unsafe withUnsafeMutableBytes(of: &registers) { bytes in
        if let base = bytes.baseAddress {
          unsafe clinux_cpuid(function, 0, base.assumingMemoryBound(to: UInt32.self))
        }
      }
      (entries[index].eax, entries[index].ebx, entries[index].ecx, entries[index].edx) = registers
    }
  }

  private var isAMD: Bool {
    // "Auth" or "Hygo"
    entry(0).map { $0.ebx == 0x6874_7541 || $0.ebx == 0x6F67_7948 } ?? false
  }

  /// The table of one processor: `prepared(for:)` plus its ids.
  package func forProcessor(id: UInt32) -> CPUIDTable {
    var table = self
    for index in table.entries.indices {
      switch table.entries[index].function {
      case 0x1:
        table.entries[index].ebx = table.entries[index].ebx & 0x00FF_FFFF | (id & 0xFF) << 24
      case 0xB:
        table.entries[index].edx = id
      case 0x8000_001E:
        table.entries[index].eax = id
        // One thread per core; core number in the low byte. One node, number 0.
        table.entries[index].ebx = id & 0xFF
        table.entries[index].ecx = 0
      default: break
      }
    }
    return table
  }
}
